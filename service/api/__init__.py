"""Routes and wire models, one file per noun. A route validates, asks one object of the state, and answers."""
