"""What crosses the network: the wire format, the uplinks and the gateway's identity towards the cloud."""
