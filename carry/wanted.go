package carry

import (
	"errors"
	"os"
	"sync"
	"time"

	"github.com/atoll-run/atoll/arrive"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/fetch"
)

const (
	// lateNeeded is how many pieces are under way at once that somebody waits for, each by a request of its own.
	lateNeeded = 32
	// lateRuns is how many requests for several pieces of a file are under way, of which nobody waits for any, and lateRun of how
	// many pieces. Together they fill a long, fat pipe, also with what is packed to a third.
	lateRuns, lateRun = 6, 8
	// lateNear is how many pieces behind one that somebody waits for are brought next: they are likely to be needed with it.
	lateNear = 2
	// lateCalm is for how long after somebody waited for a piece only one request is under way for what nobody asked for.
	lateCalm = time.Second
	// lateEdge is how many pieces of a file's beginning and end come before its middle: they say what is in it.
	lateEdge = 8
	// maxWanted bounds the pieces that wait for their turn. What is asked for beyond that is asked for again.
	maxWanted = 1 << 14
)

// urgency is why a piece comes.
type urgency int

const (
	needed urgency = iota // somebody waits for it
	ahead                 // somebody will need it
	behind                // nobody asked for it
	urgencies
)

// queue says which piece comes next. It is safe for use by several goroutines.
type queue struct {
	mu     sync.Mutex
	files  []*lateFile
	wanted [behind][]piece // the first comes first
	moved  time.Time       // when something came
	waited time.Time       // when somebody last had to wait
	spare  int             // requests under way for what nobody asked for
	came   [urgencies]int  // pieces, by why they came
	change chan struct{}   // closed, and replaced, when a piece is wanted or ends
}

// lateFile is a file on its way.
type lateFile struct {
	name string
	f    *os.File
	part chunk.Part
	came []pieceState
	next int // of what comes behind, in the order of edges and middle
	left int // pieces that have not come
}

type pieceState byte

const (
	absent pieceState = iota
	underWay
	here
)

// piece is a piece of a file; last: with it ends a request for what nobody asked for.
type piece struct {
	file *lateFile
	n    int
	why  urgency
	last bool
}

// chunk is what is asked for.
func (p piece) chunk() fetch.Piece {
	ref := p.file.part.Chunks[p.n]
	return fetch.Piece{ID: ref.ID, File: p.file.part.Digest, At: int64(p.n) * arrive.PieceSize, Size: ref.Size}
}

func newQueue() *queue { return &queue{moved: time.Now(), change: make(chan struct{})} }

func (q *queue) add(name string, f *os.File, p chunk.Part) {
	q.files = append(q.files, &lateFile{name: name, f: f, part: p, came: make([]pieceState, len(p.Chunks)), left: len(p.Chunks)})
}

// close closes the files.
func (q *queue) close() error {
	var errs []error
	for _, f := range q.files {
		errs = append(errs, f.f.Close())
	}
	return errors.Join(errs...)
}

// signal wakes who waits. The caller holds the lock.
func (q *queue) signal() {
	close(q.change)
	q.change = make(chan struct{})
}

// want puts a piece in its place: before all that is less urgent. What is needed brings its neighbours.
func (q *queue) want(w arrive.Want, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, f := range q.files {
		n := w.Offset / arrive.PieceSize
		if f.name != w.File || w.Offset < 0 || n >= int64(len(f.came)) || f.came[n] == here {
			continue
		}
		p := piece{file: f, n: int(n), why: needed}
		if w.Ahead {
			p.why = ahead
		} else {
			q.waited = now
		}
		if f.came[n] != absent || len(q.wanted[p.why]) >= maxWanted {
			continue
		}
		q.wanted[p.why] = append(q.wanted[p.why], p)
		if p.why == needed && len(q.wanted[ahead]) < maxWanted {
			q.wanted[ahead] = append(near(p), q.wanted[ahead]...)
		}
		q.signal()
	}
}

// near are the pieces that are brought because of one that is needed.
func near(p piece) (list []piece) {
	for n := p.n + 1; n <= p.n+lateNear && n < len(p.file.came); n++ {
		if p.file.came[n] == absent {
			list = append(list, piece{file: p.file, n: n, why: ahead})
		}
	}
	return list
}

// take returns the pieces of one file to be asked for next by one request: the most urgent. One that somebody waits for comes alone;
// onlyNeeded: no others are taken. done is true when there never will be any; changed is closed when there may be some.
func (q *queue) take(onlyNeeded bool, now time.Time) (run []piece, done bool, changed <-chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	done = true
	for _, f := range q.files {
		done = done && f.left == 0
	}
	if run = q.first(needed, 1); len(run) > 0 || onlyNeeded {
		return run, done, q.change
	}
	if run = q.first(ahead, lateRun); len(run) > 0 {
		return run, done, q.change
	}
	if q.spare > 0 && now.Sub(q.waited) < lateCalm {
		return nil, done, q.change
	}
	for _, f := range q.files {
		for f.next < len(f.came) && len(run) < lateRun {
			n := order(f.next, len(f.came))
			if f.next++; f.came[n] == absent {
				f.came[n] = underWay
				run = append(run, piece{file: f, n: n, why: behind})
			}
		}
		if len(run) > 0 {
			q.spare++
			run[len(run)-1].last = true
			break
		}
	}
	return run, done, q.change
}

// first takes up to limit pieces of one file from what is wanted. The caller holds the lock.
func (q *queue) first(why urgency, limit int) (run []piece) {
	for len(run) < limit && len(q.wanted[why]) > 0 {
		p := q.wanted[why][0]
		if p.file.came[p.n] == absent {
			if len(run) > 0 && run[0].file != p.file {
				break
			}
			p.file.came[p.n] = underWay
			run = append(run, p)
		}
		q.wanted[why] = q.wanted[why][1:]
	}
	return run
}

// order returns which of count pieces is the i-th to come: the beginning, the end, and then the middle. It is a pure function.
func order(i, count int) int {
	edge := min(lateEdge, count/2)
	switch {
	case i < edge:
		return i
	case i < 2*edge:
		return count - 2*edge + i
	}
	return i - edge
}

// ended notes that a piece came.
func (q *queue) ended(p piece) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p.file.came[p.n] = here
	p.file.left--
	q.came[p.why]++
	if p.last {
		q.spare--
	}
	q.moved = time.Now()
	q.signal()
}

// quiet is for how long nothing has come.
func (q *queue) quiet() time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	return time.Since(q.moved)
}

// counts are how many pieces have come because somebody waited, would need them, and for neither.
func (q *queue) counts() [urgencies]int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.came
}
