"""When the world has changed, a new model is needed: drift or decay of the stable model can propose or start a training."""
