"""What a model is: one configuration and one modeling file per family, and the layers they share."""
