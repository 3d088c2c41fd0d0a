package engine

import "slices"

// Guesses at what comes next are taken from the text itself: where its last few
// tokens stood before, what followed them then. Code, quotations and tool calls
// repeat themselves. A wrong guess costs computing it, never the answer.
const (
	longestEcho  = 4 // tokens that must have stood there before, at most
	shortestEcho = 2
)

// guess returns up to n tokens that may follow text.
func guess(text []int32, n int) []draft {
	if n <= 0 {
		return nil
	}
	for size := min(longestEcho, len(text)-1); size >= shortestEcho; size-- {
		tail := text[len(text)-size:]
		for i := len(text) - size - 1; i >= 0; i-- { // the latest place first
			if slices.Equal(text[i:i+size], tail) {
				var list []draft
				for _, token := range text[i+size : min(i+size+n, len(text))] {
					list = append(list, draft{token: token})
				}
				return list
			}
		}
	}
	return nil
}
