package tensor

import "math"

// encodeQ4K fits a scale and a minimum to each 32 numbers, rounds these to 6 bits of the largest in the block, and then the
// numbers to the levels that the rounded ones give.
func encodeQ4K(b []byte, x []float32) {
	var scales, minima [8]float32
	var topScale, topMin float32
	for k := range 8 {
		scales[k], minima[k] = fitRange(x[k*32:k*32+32], 15)
		topScale, topMin = max(topScale, scales[k]), max(topMin, minima[k])
	}
	putHalf(b, topScale/63)
	putHalf(b[2:], topMin/63)
	d, dmin := getHalf(b), getHalf(b[2:])
	packed := b[4:16]
	clear(packed)
	for k := range 8 {
		s, m := level(scales[k]*inverse(topScale)*63, 63), level(minima[k]*inverse(topMin)*63, 63)
		if k < 4 {
			packed[k], packed[k+4] = s, m
		} else {
			packed[k+4] = s&15 | m<<4
			packed[k-4] |= s >> 4 << 6
			packed[k] |= m >> 4 << 6
		}
	}
	q := b[16:144]
	clear(q)
	for i, v := range x {
		k := i / 32
		s, m := scaleMin(packed, k)
		q[k/2*32+i%32] |= level((v+dmin*float32(m))*inverse(d*float32(s)), 15) << (k % 2 * 4)
	}
}

// fitRange finds scale and minimum >= 0 such that x is near scale*q - minimum, q in 0..top. It tries steps a little finer and
// coarser than the range asks for, solves each for the least squared error, in which large numbers weigh more, and keeps the best.
func fitRange(x []float32, top int) (scale, minimum float32) {
	low, high := bounds(x)
	low = min(low, 0)
	if high <= low {
		return 0, -low
	}
	var square float64
	for _, v := range x {
		square += float64(v) * float64(v)
	}
	base := math.Sqrt(square / float64(len(x)))
	best := math.Inf(1)
	for step := range 22 {
		inv := (float64(top) - 1.1 + 0.1*float64(step)) / float64(high-low)
		if step == 0 { // the plain choice: the range as it is
			inv = float64(top) / float64(high-low)
		}
		s, m := leastSquares(x, inv, float64(low), base, top)
		if s <= 0 {
			continue
		}
		var err float64
		for _, v := range x {
			l := float64(level(float32((float64(v)+m)/s), top))
			diff := s*l - m - float64(v)
			err += (base + math.Abs(float64(v))) * diff * diff
		}
		if err < best {
			best, scale, minimum = err, float32(s), float32(m)
		}
	}
	return scale, minimum
}

// leastSquares returns the scale and minimum that fit best when x is rounded with inv steps a unit above low.
func leastSquares(x []float32, inv, low, base float64, top int) (scale, minimum float64) {
	var w, wl, wll, wx, wxl float64
	for _, f := range x {
		v := float64(f)
		l := float64(level(float32((v-low)*inv), top))
		weight := base + math.Abs(v)
		w += weight
		wl += weight * l
		wll += weight * l * l
		wx += weight * v
		wxl += weight * v * l
	}
	det := w*wll - wl*wl
	if det <= 0 {
		return 1 / inv, -low
	}
	scale, minimum = (w*wxl-wx*wl)/det, (wl*wxl-wll*wx)/det
	if minimum < 0 { // numbers cannot be added by a minimum
		return wxl / wll, 0
	}
	return scale, minimum
}

// encodeQ6K fits a scale to each 16 numbers, rounds it to a signed byte of the largest in the block, and then the numbers.
func encodeQ6K(b []byte, x []float32) {
	var scales [16]float32
	for k := range scales {
		scales[k] = fitScale(x[k*16:k*16+16], 32)
	}
	clear(b)
	low, high, packed := b[:128], b[128:192], b[192:208]
	top := extreme(scales[:])
	if top == 0 {
		return
	}
	putHalf(b[208:], top/-128)
	d := getHalf(b[208:])
	for k, s := range scales {
		packed[k] = byte(int8(min(127, math.RoundToEven(float64(s/top)*-128))))
	}
	for i, v := range x {
		q := level(v*inverse(d*float32(int8(packed[i/16])))+32, 63)
		half, quarter := i/128, i%128/32
		low[half*64+quarter%2*32+i%32] |= q & 15 << (quarter / 2 * 4)
		high[half*32+i%32] |= q >> 4 << (quarter * 2)
	}
}

// fitScale finds the scale such that x is near scale*q, q in -half..half-1, by trying some about the plain choice. Large
// numbers weigh more.
func fitScale(x []float32, half int) float32 {
	e := float64(extreme(x))
	if e == 0 {
		return 0
	}
	var scale, best float64
	for step := -9; step <= 9; step++ {
		inv := -(float64(half) + 0.1*float64(step)) / e
		var wll, wxl float64
		for _, f := range x {
			v := float64(f)
			l := float64(level(float32(v*inv)+float32(half), 2*half-1)) - float64(half)
			wll += v * v * l * l
			wxl += v * v * v * l
		}
		// With the best scale, wxl/wll, the error is smallest where wxl^2/wll is largest.
		if wll > 0 && wxl*wxl/wll > best {
			best, scale = wxl*wxl/wll, wxl/wll
		}
	}
	return float32(scale)
}
