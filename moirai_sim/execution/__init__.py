"""What did happen: a placement run on real devices."""
