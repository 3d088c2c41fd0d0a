// Package cache keeps the keys and values of tokens in pages that sequences share
// as far as they begin alike, and whole answers.
package cache

import (
	"fmt"
	"math"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// Layout is the shape of a page: the keys and values of KV.PageLen tokens in each
// of so many layers.
type Layout struct {
	Layers int
	KV     tensor.KVShape
}

// PageBytes is the size of one page.
func (l Layout) PageBytes() int64 { return int64(l.Layers) * int64(l.KV.PageBytes()) }

// TokenBytes is what one token takes of the cache.
func (l Layout) TokenBytes() int64 { return l.PageBytes() / int64(l.KV.PageLen) }

// Page is the number of a page in its pool.
type Page int32

// store is the memory of all pages. It is taken from the system when it is first
// touched, so an idle cache costs nothing.
type store struct {
	layout Layout
	memory *tensor.Memory
	slab   []byte
}

func newStore(l Layout, pages int) (*store, error) {
	const op = "cache.New"
	if err := l.KV.Check(); err != nil {
		return nil, sandbox.E(op, sandbox.Invalid, "", err)
	}
	if l.Layers < 1 || pages < 1 || int64(pages) > math.MaxInt32 || l.PageBytes() > math.MaxInt/int64(pages) {
		return nil, sandbox.Errorf(op, sandbox.Invalid, "", "%d pages of %d layers", pages, l.Layers)
	}
	memory, err := tensor.Alloc(int(l.PageBytes()) * pages)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Exhausted, "", fmt.Errorf("keys and values: %w", err))
	}
	return &store{layout: l, memory: memory, slab: memory.Bytes()}, nil
}

// page is all bytes of a page, for writing it out and reading it in.
func (s *store) page(p Page) []byte {
	n := s.layout.PageBytes()
	return s.slab[int64(p)*n:][:n:n]
}

// Block is the memory of one layer of a page.
func (s *store) Block(p Page, layer int) []byte {
	n := s.layout.KV.PageBytes()
	return s.page(p)[layer*n:][:n:n]
}
