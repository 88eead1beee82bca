"""The study file, run files and the tables read from them."""
