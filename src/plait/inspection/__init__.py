"""What adapters are and how they relate: compatibility, geometry, doubts."""
