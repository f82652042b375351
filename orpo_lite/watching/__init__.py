"""Numbers watched while a run trains: what is not finite never reaches the adapter, and what looks ill is said."""
