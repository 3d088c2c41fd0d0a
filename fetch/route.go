// Package fetch gets the chunks of files from the nearest node that has them.
//
// Nodes say where they are: a region, and a place within it. A chunk that comes from afar is fetched once for the region and
// once for each place, whoever wants it: for each chunk, one of a place's nodes asks for all of them, and one of the region's
// asks afar. Which one, follows from the names of the nodes and of the chunk alone (Next), so that nodes which fetch the same
// thing at the same time fetch different chunks from afar and exchange them, without talking about it. A node that does not
// answer is left out for a while.
package fetch

import (
	"encoding/binary"
	"strings"

	"github.com/zeebo/xxh3"

	"github.com/atoll-run/atoll/chunk"
)

// Node is a node as far as the way to it matters.
type Node struct {
	ID   string
	Site string // "region/place"; empty: unknown, and far from everything
}

// Distance is how far two sites are from each other.
type Distance int

// The distances: the tiers of the topology.
const (
	Local    Distance = iota // the same place
	Regional                 // another place of the region
	Global
)

// String returns the distance's name.
func (d Distance) String() string { return [...]string{"local", "regional", "global"}[d] }

// Between returns the distance of two sites.
func Between(a, b string) Distance {
	regionA, _, _ := strings.Cut(a, "/")
	regionB, _, _ := strings.Cut(b, "/")
	switch {
	case a == "" || b == "" || regionA != regionB:
		return Global
	case a == b:
		return Local
	}
	return Regional
}

// A Stage is how far a request for a chunk has come. Each node that hands it on raises it, so that it ends.
type Stage int

// The stages.
const (
	Wanted Stage = iota // by the node itself
	ForSite
	ForRegion
)

// Next returns which node is asked for a chunk that self does not have, and the stage at which that one goes on. It is the
// source itself when that is as near as any other, or when self is the one that fetches the chunk for all. It is a pure
// function; peers are those that answer.
func Next(self Node, peers []Node, source Node, id chunk.ID, stage Stage) (Node, Stage) {
	far := Between(self.Site, source.Site)
	for _, tier := range []struct {
		within Distance
		stage  Stage
	}{{Local, ForSite}, {Regional, ForRegion}} {
		if stage >= tier.stage || far <= tier.within {
			continue
		}
		if o := owner(self, peers, source, id, tier.within); o.ID != self.ID {
			return o, tier.stage
		}
	}
	return source, ForRegion
}

// owner returns the node that fetches a chunk for all within a distance of self: the one with the highest hash of both names,
// so that little changes when a node comes or goes.
func owner(self Node, peers []Node, source Node, id chunk.ID, within Distance) Node {
	best, most := self, weight(self, id)
	for _, p := range peers {
		if p.ID == source.ID || p.ID == self.ID || Between(self.Site, p.Site) > within {
			continue
		}
		if w := weight(p, id); w > most || w == most && p.ID < best.ID {
			best, most = p, w
		}
	}
	return best
}

func weight(n Node, id chunk.ID) uint64 {
	return xxh3.HashSeed(append([]byte(n.ID), id[:]...), binary.LittleEndian.Uint64([]byte("atollown")))
}
