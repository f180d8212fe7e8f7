"""The domain: records, jobs, storage, search. Imports no torch, no ray and no fastapi."""
