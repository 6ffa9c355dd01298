"""radiance_mlx: a local service that keeps learning: LoRA updates in the background, answers all the while."""

__version__ = "0.1.0"
