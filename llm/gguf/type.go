package gguf

import "github.com/atoll-run/atoll/tensor"

// Type is how the numbers of a tensor are stored; its values are those in files.
type Type = tensor.Type
