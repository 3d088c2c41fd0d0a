package node

import "math/rand/v2"

// Names are for people to read aloud and type; sandboxes are identified by ID.
var (
	adjectives = []string{"amber", "brave", "calm", "clever", "coral", "crisp", "deep", "eager", "fair", "fleet",
		"fresh", "gentle", "golden", "happy", "hidden", "keen", "kind", "light", "lively", "lucid",
		"mellow", "mild", "neat", "noble", "open", "pale", "plain", "proud", "quick", "quiet",
		"rapid", "rare", "ready", "sandy", "sharp", "shy", "silent", "silver", "smooth", "solid",
		"steady", "still", "sunny", "swift", "tidal", "tidy", "vivid", "warm", "wild", "wise"}
	nouns = []string{"anchor", "bay", "beach", "breeze", "buoy", "cape", "cay", "channel", "cliff", "cloud",
		"cove", "current", "delta", "drift", "dune", "ebb", "fin", "fjord", "foam", "gull",
		"harbor", "heron", "island", "kelp", "lagoon", "ledge", "lighthouse", "mast", "palm", "pearl",
		"pelican", "pier", "pool", "rain", "reef", "ripple", "sail", "sand", "shell", "shoal",
		"shore", "spray", "star", "stone", "strait", "surf", "tide", "turtle", "wave", "wind"}
)

// newName proposes names until taken accepts none of them as its own: first
// short ones, then, when many are in use, with a number.
func newName(taken func(string) bool) string {
	for try := 0; ; try++ {
		name := adjectives[rand.N(len(adjectives))] + "-" + nouns[rand.N(len(nouns))]
		if try > 8 {
			name += "-" + string(rune('a'+rand.N(26))) + string(rune('0'+rand.N(10))) + string(rune('a'+rand.N(26)))
		}
		if !taken(name) {
			return name
		}
	}
}
