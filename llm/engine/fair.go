package engine

import "slices"

// queue orders requests so that every tenant gets its part of the machine: each in
// turn may start requests worth a quantum of tokens times its weight; what it
// does not use up it keeps for its next turn, as long as it has requests
// (deficit round robin). Within a tenant the order is that of arrival.
type queue struct {
	limit   int // requests over all tenants
	size    int
	weight  map[string]int // absent is 1
	lines   map[string]*line
	turns   []string // tenants that have requests; the first is being served
	granted bool     // the first has got its quantum of this turn
}

type line struct {
	deficit int // tokens that may still be started
	waiting []*sequence
}

// quantum is the tokens, of prompt and answer, of one turn. A request larger than
// it waits for several.
const quantum = 512

func newQueue(limit int, weight map[string]int) *queue {
	return &queue{limit: limit, weight: weight, lines: map[string]*line{}}
}

// push adds a request, or reports that the queue is full. One tenant may fill at
// most half, so that there is always room for another.
func (q *queue) push(s *sequence) bool {
	l := q.lines[s.req.Tenant]
	if q.size >= q.limit || (l != nil && len(l.waiting) >= max(1, q.limit/2)) {
		return false
	}
	if l == nil {
		l = &line{}
		q.lines[s.req.Tenant] = l
		q.turns = append(q.turns, s.req.Tenant)
	}
	l.waiting = append(l.waiting, s)
	q.size++
	return true
}

// next is the request whose turn it is, or nil. It stays until it is popped.
func (q *queue) next() *sequence {
	for len(q.turns) > 0 {
		tenant := q.turns[0]
		l := q.lines[tenant]
		if !q.granted {
			l.deficit += quantum * max(1, q.weight[tenant])
			q.granted = true
		}
		if s := l.waiting[0]; s.cost() <= l.deficit || len(q.turns) == 1 {
			return s
		}
		q.turns = append(q.turns[1:], tenant)
		q.granted = false
	}
	return nil
}

// resume puts sequences back that had been popped, in front of their tenants'
// lines. There is always room for them: they were counted before.
func (q *queue) resume(back []*sequence) {
	for _, s := range slices.Backward(back) {
		l := q.lines[s.req.Tenant]
		if l == nil {
			l = &line{}
			q.lines[s.req.Tenant] = l
			q.turns = append(q.turns, s.req.Tenant)
		}
		l.deficit += s.cost() // it has paid for its turn
		l.waiting = slices.Insert(l.waiting, 0, s)
		q.size++
	}
}

// pop removes what next returned.
func (q *queue) pop() {
	l := q.lines[q.turns[0]]
	l.deficit = max(0, l.deficit-l.waiting[0].cost())
	q.drop(q.turns[0], 0)
}

// remove takes out a request that is not wanted any more.
func (q *queue) remove(s *sequence) bool {
	l := q.lines[s.req.Tenant]
	if l == nil {
		return false
	}
	i := slices.Index(l.waiting, s)
	if i >= 0 {
		q.drop(s.req.Tenant, i)
	}
	return i >= 0
}

func (q *queue) drop(tenant string, i int) {
	l := q.lines[tenant]
	l.waiting = slices.Delete(l.waiting, i, i+1)
	q.size--
	if len(l.waiting) > 0 {
		return
	}
	delete(q.lines, tenant)
	at := slices.Index(q.turns, tenant)
	q.turns = slices.Delete(q.turns, at, at+1)
	if at == 0 {
		q.granted = false
	}
}
