"""What did happen: run a placement on real devices, one worker process a device."""
