"""What runs on a gateway: it polls devices, validates, keeps every scan on disk and forwards it."""
