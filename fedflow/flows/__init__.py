"""The flows themselves, deployable: a run (training), a round (round), a site's part in it (site). No arithmetic here."""
