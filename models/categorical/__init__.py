"""Variational autoencoders of N categorical latent variables (Jang et al. 2017; Maddison et al. 2017)."""
