"""Images to train on, calibrate with and measure by: where they come from and how a model sees them."""
