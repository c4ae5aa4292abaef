"""What passes and exporters ask of a graph: shapes, constants, folding, and the Program."""
