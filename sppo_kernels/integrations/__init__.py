"""SPPO inside the trainers people already have; each module imports its framework when used."""
