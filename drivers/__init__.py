"""What a device says: the driver contracts, the registry, the codec and the drivers."""
