"""The semi-supervised model M2 (Kingma et al. 2014): its bound, J, exact evaluation, pictures and alarms."""
