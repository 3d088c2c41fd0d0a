package gguf

import (
	"fmt"
	"iter"
	"math"
)

// Meta is the metadata of a file, in its order. A value is one of uint8, int8,
// uint16, int16, uint32, int32, uint64, int64, float32, float64, bool, string,
// or a slice of one of these. The zero Meta is empty and ready to use.
type Meta struct {
	keys   []string
	values map[string]any
}

// Len returns how many keys there are.
func (m *Meta) Len() int { return len(m.keys) }

// All iterates over keys and values in order.
func (m *Meta) All() iter.Seq2[string, any] {
	return func(yield func(string, any) bool) {
		for _, k := range m.keys {
			if !yield(k, m.values[k]) {
				return
			}
		}
	}
}

// Get returns the value of a key, or nil.
func (m *Meta) Get(key string) any { return m.values[key] }

// Set gives a key a value, in its old place if it had one. It refuses values
// that a file cannot hold.
func (m *Meta) Set(key string, value any) error {
	if kindOf(value) == kindInvalid {
		return fmt.Errorf("metadata %q: a %T cannot be stored", key, value)
	}
	if key == "" || len(key) > maxKey {
		return fmt.Errorf("a metadata key has 1 to %d bytes, not %d", maxKey, len(key))
	}
	if m.values == nil {
		m.values = map[string]any{}
	}
	if _, ok := m.values[key]; !ok {
		m.keys = append(m.keys, key)
	}
	m.values[key] = value
	return nil
}

// Delete removes a key, if it is there.
func (m *Meta) Delete(key string) {
	if _, ok := m.values[key]; !ok {
		return
	}
	delete(m.values, key)
	kept := make([]string, 0, len(m.keys))
	for _, k := range m.keys {
		if k != key {
			kept = append(kept, k)
		}
	}
	m.keys = kept
}

// Clone returns a copy whose keys can be changed without changing m's; slices
// are shared.
func (m *Meta) Clone() Meta {
	c := Meta{keys: append([]string(nil), m.keys...), values: make(map[string]any, len(m.values))}
	for k, v := range m.values {
		c.values[k] = v
	}
	return c
}

// String returns a string; false when it is missing or something else.
func (m *Meta) String(key string) (string, bool) { v, ok := m.values[key].(string); return v, ok }

// Bool returns a truth value; false when it is missing or something else.
func (m *Meta) Bool(key string) (value, ok bool) { value, ok = m.values[key].(bool); return value, ok }

// Strings returns an array of strings, which is shared; false when it is
// missing or something else.
func (m *Meta) Strings(key string) ([]string, bool) { v, ok := m.values[key].([]string); return v, ok }

// Int returns an integer of any width; false when it is missing, too large or
// something else.
func (m *Meta) Int(key string) (int64, bool) {
	switch v := m.values[key].(type) {
	case uint8:
		return int64(v), true
	case int8:
		return int64(v), true
	case uint16:
		return int64(v), true
	case int16:
		return int64(v), true
	case uint32:
		return int64(v), true
	case int32:
		return int64(v), true
	case uint64:
		return int64(v), v <= math.MaxInt64
	case int64:
		return v, true
	}
	return 0, false
}

// Float returns a number of any kind; false when it is missing or something else.
func (m *Meta) Float(key string) (float64, bool) {
	switch v := m.values[key].(type) {
	case float32:
		return float64(v), true
	case float64:
		return v, true
	}
	n, ok := m.Int(key)
	return float64(n), ok
}

// Ints returns an array of integers of any width, or of truth values as 0 and
// 1; false when it is missing, something else or too large.
func (m *Meta) Ints(key string) ([]int64, bool) {
	switch v := m.values[key].(type) {
	case []uint8:
		return widen(v), true
	case []int8:
		return widen(v), true
	case []uint16:
		return widen(v), true
	case []int16:
		return widen(v), true
	case []uint32:
		return widen(v), true
	case []int32:
		return widen(v), true
	case []int64:
		return v, true
	case []uint64:
		for _, n := range v {
			if n > math.MaxInt64 {
				return nil, false
			}
		}
		return widen(v), true
	case []bool:
		n := make([]int64, len(v))
		for i := range v {
			if v[i] {
				n[i] = 1
			}
		}
		return n, true
	}
	return nil, false
}

// Floats returns an array of numbers; false when it is missing or something else.
func (m *Meta) Floats(key string) ([]float32, bool) {
	switch v := m.values[key].(type) {
	case []float32:
		return v, true
	case []float64:
		f := make([]float32, len(v))
		for i := range v {
			f[i] = float32(v[i])
		}
		return f, true
	}
	return nil, false
}

func widen[T uint8 | int8 | uint16 | int16 | uint32 | int32 | uint64](v []T) []int64 {
	n := make([]int64, len(v))
	for i := range v {
		n[i] = int64(v[i])
	}
	return n
}
