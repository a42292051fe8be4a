"""What crosses the network between a gateway and the cloud: the wire format, the uplinks, identity."""
