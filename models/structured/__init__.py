"""Structured output prediction: lower halves of images from upper halves (Raiko et al. 2015; Jang et al. 2017)."""
