package model_test

import "testing"

// What follows a text is the same whether its last tokens come one by one, as answers are generated, or together, as guesses are
// verified: else a guess would change an answer.
func TestFewTokensAreComputedAlikeOneByOneAndTogether(t *testing.T) {
	const file = "smollm2-135m-instruct-q4_1.gguf"
	m := openFile(t, file)
	tokens := encode(t, file, "The reef is a ring around the lagoon, and the lagoon is still. Nobody knows how deep it is, or who came here first.")
	one, many, vocab := begin(t, m), begin(t, m), m.Config().Vocab
	one.next(t, m, tokens[:8])
	many.next(t, m, tokens[:8])
	for at, n := 8, 2; at+n <= len(tokens) && n < 8; at, n = at+n, n+1 {
		together := many.next(t, m, tokens[at:at+n])
		for i := range n {
			alone := one.next(t, m, tokens[at+i:at+i+1])
			if d := furthest(t, together[i*vocab:(i+1)*vocab], alone); d != 0 {
				t.Errorf("token %d of %d differs by %v", i, n, d)
			}
		}
	}
}
