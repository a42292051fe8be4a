"""What a gateway runs: images, their manifests and signatures, and how one takes the place of another."""
