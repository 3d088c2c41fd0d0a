package gvisor

func usePrecompiledFilters() {}
