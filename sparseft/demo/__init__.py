"""The embedded study: CLDR names, a tiny multilingual encoder, and the recipe for its diffs."""
