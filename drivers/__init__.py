"""What a device says: the contract every driver keeps, and the drivers that ship with Headgate."""
