"""The family of auxiliary deep generative models: M2 with an auxiliary Gaussian a beside z."""
