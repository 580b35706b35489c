"""The demonstration: the whole way of a request, on real input, on one machine, in about a minute."""
