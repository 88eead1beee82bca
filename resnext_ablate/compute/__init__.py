"""One run on a device: layers, images, training, measurement."""
