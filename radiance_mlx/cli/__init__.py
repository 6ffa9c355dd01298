"""The commands: `python -m radiance_mlx`, installed as `radiance-mlx`."""
