"""Everything that touches a model: torch, transformers and Ray live only here."""
