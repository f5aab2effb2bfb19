"""The fused operators inside trainers that people already have; each imported only when used."""
