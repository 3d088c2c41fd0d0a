package engine

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// What ParseAttention fills in.
const (
	firstTokens = 64   // at the beginning of a text, always attended to
	nearTokens  = 256  // before the present one, by sparse attention
	window      = 1024 // by attention in a window
	chosenPages = 64   // by sparse attention: 2048 tokens
)

// ParseAttention returns what tokens attend to: "full" is all; "window" or "window:N" the first 64 tokens and the N before;
// "sparse" or "sparse:N" the first 64, the 256 before and, of the rest, the N pages whose keys may say most to the query.
func ParseAttention(s string) (tensor.Sparse, error) {
	kind, number, given := strings.Cut(s, ":")
	n, err := 0, error(nil)
	if given {
		n, err = strconv.Atoi(number)
	}
	switch {
	case err != nil || given && (n < 1 || n > 1<<24) || given && kind == "full":
	case kind == "full":
		return tensor.Sparse{}, nil
	case kind == "window" && given:
		return tensor.Sparse{Near: n, First: firstTokens}, nil
	case kind == "window":
		return tensor.Sparse{Near: window, First: firstTokens}, nil
	case kind == "sparse" && given:
		return tensor.Sparse{Near: nearTokens, First: firstTokens, Pages: n}, nil
	case kind == "sparse":
		return tensor.Sparse{Near: nearTokens, First: firstTokens, Pages: chosenPages}, nil
	}
	return tensor.Sparse{}, sandbox.Errorf("engine.ParseAttention", sandbox.Invalid, "", "attention %.40q is none of full, window, window:TOKENS, sparse and sparse:PAGES", s)
}

// kindOf tells the keys and values of texts that attended to different things apart, since they differ; "" is those of all.
func kindOf(s tensor.Sparse) string {
	if s == (tensor.Sparse{}) {
		return ""
	}
	return fmt.Sprint(s)
}
