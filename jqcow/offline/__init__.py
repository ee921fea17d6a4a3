"""Work on whole images, never on a guest's request."""
