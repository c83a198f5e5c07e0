"""Before a start over several hosts: are they alike, do they reach each other, and how fast? One of them listens, the
others come to it, and all of them tell what was found."""
