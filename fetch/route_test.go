package fetch

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/atoll-run/atoll/chunk"
)

// world is a topology: two regions, two places in one of them, and a source far away.
func world() (nodes []Node, source Node) {
	for i, site := range []string{"eu/one", "eu/one", "eu/one", "eu/two", "eu/two", "us/one", "us/one"} {
		nodes = append(nodes, Node{fmt.Sprintf("node%d", i), site})
	}
	return nodes, Node{"source", "asia/one"}
}

func name(i int) chunk.ID { return chunk.Sum(binary.LittleEndian.AppendUint32(nil, uint32(i))) }

// conformance: W3 V5
func TestEachChunkComesOnceFromAfarForEachRegionAndOnceForEachPlace(t *testing.T) {
	nodes, source := world()
	const chunks = 400
	global, regional := make(map[string]int), make(map[string]int) // questions by who answers, for each region and place
	share := make(map[string]int)
	for i := range chunks {
		has := map[string]bool{}
		for _, n := range nodes { // all want it, one after the other
			at, stage := n, Wanted
			for hop := 0; !has[at.ID] && at.ID != source.ID; hop++ {
				if hop > 3 {
					t.Fatal("it is handed on without end")
				}
				has[at.ID] = true // once it is there
				next, then := Next(at, nodes, source, name(i), stage)
				switch Between(at.Site, next.Site) {
				case Global:
					global[at.Site[:2]]++
					share[at.ID]++
				case Regional:
					regional[at.Site]++
				}
				at, stage = next, then
			}
		}
	}
	for region, n := range global {
		if n != chunks {
			t.Errorf("%d chunks come from afar to %s, want %d", n, region, chunks)
		}
	}
	for place, n := range regional {
		if n > chunks {
			t.Errorf("%d chunks come to %s from its region", n, place)
		}
	}
	for _, n := range nodes {
		if s := share[n.ID]; s < chunks/12 {
			t.Errorf("%s fetches %d of the chunks", n.ID, s)
		}
	}
}

// conformance: W3
func TestWhatIsNearIsAskedItself(t *testing.T) {
	nodes, _ := world()
	for i := range 50 {
		if n, _ := Next(nodes[0], nodes, nodes[1], name(i), Wanted); n.ID != nodes[1].ID {
			t.Fatalf("%s is asked for what is at the same place", n.ID)
		}
		if n, _ := Next(nodes[0], nodes, nodes[3], name(i), Wanted); Between(nodes[0].Site, n.Site) > Regional {
			t.Fatalf("%s is asked for what is in the region", n.ID)
		}
		if n, _ := Next(Node{ID: "nowhere"}, nodes, nodes[3], name(i), Wanted); n.ID != nodes[3].ID {
			t.Fatalf("a node that does not say where it is asks %s", n.ID)
		}
	}
}

func TestANodeThatIsGoneChangesOnlyItsOwnChunks(t *testing.T) {
	nodes, source := world()
	rest := append([]Node{}, nodes[:2]...)
	rest = append(rest, nodes[3:]...)
	for i := range 200 {
		before, _ := Next(nodes[0], nodes, source, name(i), Wanted)
		after, _ := Next(nodes[0], rest, source, name(i), Wanted)
		if before != after && before.ID != nodes[2].ID && before.ID != source.ID && after.ID != source.ID {
			t.Fatalf("chunk %d moves from %s to %s", i, before.ID, after.ID)
		}
	}
}

func TestDistances(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want Distance
	}{{"eu/one", "eu/one", Local}, {"eu/one", "eu/two", Regional}, {"eu", "eu", Local}, {"eu", "eu/one", Regional},
		{"eu/one", "us/one", Global}, {"", "", Global}, {"", "eu", Global}} {
		if got := Between(c.a, c.b); got != c.want || Between(c.b, c.a) != got {
			t.Errorf("%q and %q are %s", c.a, c.b, got)
		}
	}
}
