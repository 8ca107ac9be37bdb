"""Where operators run: devices, links and routes."""
