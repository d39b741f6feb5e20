"""An embedded synthetic world in which only search can answer."""
