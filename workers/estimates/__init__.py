"""What a build will cost, before it runs: rehearsed without workers, priced by a short measured probe."""
