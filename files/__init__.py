"""Files that training and audiences both have to do with; nothing of the service's needs them."""
