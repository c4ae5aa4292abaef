"""What passes and exporters ask of a graph."""
