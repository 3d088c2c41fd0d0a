package gguf

// A kind is how a metadata value is stored; its values are those in files.
type kind uint32

const (
	kindUint8 kind = iota
	kindInt8
	kindUint16
	kindInt16
	kindUint32
	kindInt32
	kindFloat32
	kindBool
	kindString
	kindArray
	kindUint64
	kindInt64
	kindFloat64
	kindInvalid
)

type number interface {
	uint8 | int8 | uint16 | int16 | uint32 | int32 | uint64 | int64 | float32 | float64
}

// bytes returns the size of a value of fixed size; 0 for strings, arrays and
// what is not known.
func (k kind) bytes() int {
	switch k {
	case kindUint8, kindInt8, kindBool:
		return 1
	case kindUint16, kindInt16:
		return 2
	case kindUint32, kindInt32, kindFloat32:
		return 4
	case kindUint64, kindInt64, kindFloat64:
		return 8
	}
	return 0
}

// first returns the only element of a slice that array made.
func first(slice any) any {
	switch v := slice.(type) {
	case []uint8:
		return v[0]
	case []int8:
		return v[0]
	case []uint16:
		return v[0]
	case []int16:
		return v[0]
	case []uint32:
		return v[0]
	case []int32:
		return v[0]
	case []uint64:
		return v[0]
	case []int64:
		return v[0]
	case []float32:
		return v[0]
	case []float64:
		return v[0]
	case []bool:
		return v[0]
	case []string:
		return v[0]
	}
	return nil
}

// kindOf returns the kind of a value, or of a slice's elements; kindInvalid for
// what a file cannot hold.
func kindOf(value any) kind {
	switch value.(type) {
	case uint8, []uint8:
		return kindUint8
	case int8, []int8:
		return kindInt8
	case uint16, []uint16:
		return kindUint16
	case int16, []int16:
		return kindInt16
	case uint32, []uint32:
		return kindUint32
	case int32, []int32:
		return kindInt32
	case uint64, []uint64:
		return kindUint64
	case int64, []int64:
		return kindInt64
	case float32, []float32:
		return kindFloat32
	case float64, []float64:
		return kindFloat64
	case bool, []bool:
		return kindBool
	case string, []string:
		return kindString
	}
	return kindInvalid
}
