"""Plugs into trainers that people already have; each subpackage imports its library when used."""
