package tokenizer

// A matcher finds tokens that stand in text as a whole: the leftmost, and of
// those the longest. It is a tree over bytes. The zero matcher finds nothing.
type matcher struct {
	nodes []matchNode // nodes[0] is the root
	first [256]bool   // what a token can begin with
}

type matchNode struct {
	next map[byte]int32
	id   int32 // the token that ends here, or -1
}

func (m *matcher) add(name string, id int32) {
	if name == "" {
		return
	}
	if m.nodes == nil {
		m.nodes = []matchNode{{id: -1}}
	}
	m.first[name[0]] = true
	at := int32(0)
	for i := range len(name) {
		next, ok := m.nodes[at].next[name[i]]
		if !ok {
			if m.nodes[at].next == nil {
				m.nodes[at].next = map[byte]int32{}
			}
			next = int32(len(m.nodes))
			m.nodes[at].next[name[i]] = next
			m.nodes = append(m.nodes, matchNode{id: -1})
		}
		at = next
	}
	if m.nodes[at].id < 0 {
		m.nodes[at].id = id
	}
}

// find returns where the first token begins and ends, and which it is; if there
// is none, the end of text twice and -1.
func (m *matcher) find(text string) (from, to int, id int32) {
	if m.nodes == nil {
		return len(text), len(text), -1
	}
	for from = range len(text) {
		if !m.first[text[from]] {
			continue
		}
		id = -1
		at := int32(0)
		for i := from; i < len(text); i++ {
			next, ok := m.nodes[at].next[text[i]]
			if !ok {
				break
			}
			if at = next; m.nodes[at].id >= 0 {
				id, to = m.nodes[at].id, i+1
			}
		}
		if id >= 0 {
			return from, to, id
		}
	}
	return len(text), len(text), -1
}
