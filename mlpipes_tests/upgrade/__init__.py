"""A home that an earlier commit wrote, made by its code and opened by this one's."""
