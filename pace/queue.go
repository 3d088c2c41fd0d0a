// Package pace divides what a node may send among classes of work.
//
// Each class has a share that it gets whenever it has something to send, and what a class leaves unused is lent to those that
// have, in proportion to their shares. The order is decided by a Queue, which has no clock; a Pacer applies it.
package pace

import "math"

// Class is what bytes are sent for.
type Class int

// The classes.
const (
	Migration  Class = iota // sandboxes and snapshots that someone waits for
	Inference               // what the shards of a model tell each other
	API                     // answers to users
	Monitoring              // metrics and events
	Backup                  // what nobody waits for
	classes
)

// String returns the class's name.
func (c Class) String() string {
	if c < 0 || c >= classes {
		return "unknown"
	}
	return [classes]string{"migration", "inference", "api", "monitoring", "backup"}[c]
}

// Shares are parts of the whole; only their proportion matters.
type Shares [classes]float64

// DefaultShares are reserved unless others are asked for, in percent.
var DefaultShares = Shares{Migration: 50, Inference: 30, API: 15, Monitoring: 3, Backup: 2}

// Queue decides in which order waiting pieces are sent: start-time fair queueing. It is a pure data structure, not safe for
// use by several goroutines.
type Queue[T any] struct {
	shares  Shares
	virtual float64          // start of the piece that was sent last
	finish  [classes]float64 // of the class's newest piece
	waiting [classes][]piece[T]
}

type piece[T any] struct {
	start float64
	size  int
	value T
}

// NewQueue returns an empty queue.
func NewQueue[T any](s Shares) *Queue[T] { return &Queue[T]{shares: s} }

// Push adds a piece of size bytes.
func (q *Queue[T]) Push(c Class, size int, value T) {
	start := max(q.virtual, q.finish[c])
	q.finish[c] = start + float64(size)/max(q.shares[c], 1e-6)
	q.waiting[c] = append(q.waiting[c], piece[T]{start, size, value})
}

// Pop takes the piece that is to be sent next; ok is false when nothing waits.
func (q *Queue[T]) Pop() (value T, size int, ok bool) {
	next, first := Class(-1), math.Inf(1)
	for c := range classes {
		if w := q.waiting[c]; len(w) > 0 && w[0].start < first {
			next, first = c, w[0].start
		}
	}
	if next < 0 {
		return value, 0, false
	}
	p := q.waiting[next][0]
	q.waiting[next] = q.waiting[next][1:]
	q.virtual = p.start
	return p.value, p.size, true
}
